"""Statistics of sets of text: their words, their political leaning, what they copy. Pure functions over texts."""
