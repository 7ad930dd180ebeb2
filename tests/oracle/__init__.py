"""Independent references that the project is measured against; nothing here imports the project."""
