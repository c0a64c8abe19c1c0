"""Run folders to tables, figures and reports; reads files only."""
