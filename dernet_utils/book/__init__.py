"""The book itself: its workflow and builder, and what chapters draw, tabulate and measure alike."""
