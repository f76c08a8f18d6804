"""The process that owns one device, its models and all that lives there. The only one with torch."""
