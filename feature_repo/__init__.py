"""The Feast repository: its configuration and what `feast apply` registers."""
