"""The database's tables as they are now (`tables`), and how older databases get there (`versions`)."""
