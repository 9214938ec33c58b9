"""How the embedded model ``demo`` was trained. Nothing of the pack imports this."""
