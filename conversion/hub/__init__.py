"""What goes to the Hub with a checkpoint: files, model code, model card, licenses."""
