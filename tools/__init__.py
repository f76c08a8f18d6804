"""Click commands for people who work on the project: what is slow here, and what was made how."""
