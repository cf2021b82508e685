"""What the scripts share; a module here imports only from modules below it."""
