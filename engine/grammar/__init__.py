"""Answers that must have a certain form: what clients ask for, as grammars, as masks of tokens."""
