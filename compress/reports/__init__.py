"""What a run found: its typed form, and its JSON, Markdown and HTML."""
