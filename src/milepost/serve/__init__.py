"""Local pages that a person works with."""
