"""Other libraries' models and checkpoints: names in, names out."""
