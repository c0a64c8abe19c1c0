"""The recipe a person writes and the frozen config it resolves to."""
