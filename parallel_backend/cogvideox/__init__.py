"""The model: what is computed. Knows nothing of how a forward is split or who asked."""
