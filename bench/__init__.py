"""
How fast this repository is. Run from its root:

    python -m bench --peers PYTHON ...         the time of a step, beside transformers and TRL        (speed.py)
    python -m bench.race RUN --peers PYTHON    the time until PPO nears the optimum, beside TRL       (race.py)
    python -m bench.before CHECKOUT            the time of a step, beside another checkout            (before.py)
"""
