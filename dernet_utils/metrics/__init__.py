"""Classification and detection metrics, their intervals by study, and tests of significance.

Pure functions of labels, scores and boxes; nothing here needs a network or a file. Other wings may
use any module: `classification`, `detection` (average precision), `froc` (free-response curves,
confusion of types), `matching`, `intervals` (bootstrap by study) and `significance`.
"""
