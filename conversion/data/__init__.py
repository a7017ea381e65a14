"""Text as token ids: one reader, and the standard held-out text."""
