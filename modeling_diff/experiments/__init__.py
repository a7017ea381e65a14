"""What scripts that train and measure share: their outputs, their tokenizers, their machine. Never in the bundle."""
