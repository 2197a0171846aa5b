"""Both branches of a block: see README.md."""
