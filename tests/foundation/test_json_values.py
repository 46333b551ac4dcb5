import json
import math

import numpy as np

from frpo.foundation.json_values import plain


def test_numbers_that_are_not_finite_are_null_and_keys_are_text():
    value = {"a": math.nan, 1: (np.float64(2.5), [np.inf, np.int64(3)]), "b": {"c": -math.inf, "d": "x", "e": None}}
    expected = {"a": None, "1": [2.5, [None, 3]], "b": {"c": None, "d": "x", "e": None}}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected
