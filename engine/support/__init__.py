"""A drawer of three files: errors, files, pixels."""
