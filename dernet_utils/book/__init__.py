"""The book itself: how it is run and built, and what its chapters share.

`graph` (what depends on what), `prepare` (a run's data), `execute` (one chapter), `build` (pages
and whole runs) and `progress` serve the command line and the Snakefile. `teaching` (a chapter's
start, values for its sentences) and the other modules serve chapters: figures, tables, time
measurements and the results of long runs. No other wing imports this one.
"""
