"""What a run stores, and how it is found, checked and read again."""
