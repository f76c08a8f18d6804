"""What sessions ask an engine to do: generators that do one layer each time they are asked."""
