"""Recipes that come with the install."""
