"""The run folder: its layout, manifest, events and records."""
