"""The foundation: errors, profiles, a run's folders, the machine, and the package's vocabulary.

Every other wing may use any module here; this wing imports no other. `errors`, `files` and
`vocabulary` import no module of the package but these.
"""
