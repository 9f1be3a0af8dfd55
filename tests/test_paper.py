"""The paper's Table 2 beside ours."""

import numpy as np

from dernet_utils.book.paper import METRICS, TABLE_2, compare_with_table_2
from dernet_utils.core.profiles import get_profile
from dernet_utils.core.workspace import Workspace
from dernet_utils.metrics.classification import classification_table


def test_columns_name_their_data_and_rows_are_complete(tmp_path):
    workspace = Workspace(get_profile("smoke"), tmp_path)
    workspace.dataset_facts.write_text('{"virtual": true}')
    y, prob = np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.6, 0.7])
    table = classification_table(y, prob, ["a", "b", "c", "d"], 0.5, resamples=100)
    beside = compare_with_table_2(workspace, {"test": {"DERNet": table}}, tuple(TABLE_2))
    assert len(beside) == len(TABLE_2) * len(METRICS)
    paper, ours = beside.columns
    assert "VinDr-SpineXR" in paper and "virtual cohort, test" in ours
    assert beside.loc[("DERNet", "AUROC"), paper] == "91.03"
    assert beside.loc[("HealNNet", "Sensitivity"), paper] == "–"
    # By hand: all abnormal above all normal; one of two normals called abnormal.
    assert beside.loc[("DERNet", "AUROC"), ours] == "100.0 [100.0, 100.0]"
    assert beside.loc[("DERNet", "Specificity"), ours].startswith("50.0 [")
    assert set(beside.loc["ResNet50", ours]) == {"–"}
