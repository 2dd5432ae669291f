"""What of all combinations runs by default."""

from __future__ import annotations

import itertools

from selection import covering, every_pair

FAMILIES, SOLVERS, PADDED = ["transformer", "trellis"], ["anderson", "broyden", "picard"], [True, False]


def test_every_value_of_both_is_in_few_pairs():
    pairs = list(itertools.product(FAMILIES, SOLVERS))
    chosen = covering(pairs)
    assert len(chosen) == 3
    assert {left for left, _ in chosen} == {*FAMILIES}
    assert {right for _, right in chosen} == {*SOLVERS}


def test_any_two_values_run_together_and_all_combinations_can_be_run():
    rows = every_pair(family=FAMILIES, solver=SOLVERS, padded=PADDED).args[1]
    assert [row.values for row in rows] == list(itertools.product(FAMILIES, SOLVERS, PADDED))
    by_default = [row for row in rows if not row.marks]
    assert by_default[0].id == "transformer-anderson-True"
    assert len(by_default) == 6
    families, solvers, padded = zip(*(row.values for row in by_default))
    assert {*zip(families, solvers)} == {*itertools.product(FAMILIES, SOLVERS)}
    assert {*zip(families, padded)} == {*itertools.product(FAMILIES, PADDED)}
    assert {*zip(solvers, padded)} == {*itertools.product(SOLVERS, PADDED)}
