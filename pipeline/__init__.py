"""
The program around the algorithms.

    config.py       every setting, once, and the command line
    stages.py       one function for each stage of RLHF: the place where the algorithms are put together
    run.py          the folder of a run: what the stages leave for each other, and a training loop within it
    report.py       what is printed at the end; diagnose.py: its states in words; page.py: the page
    episode.py      single answers, token by token
    pairs.py        preference files of any form
    files.py        files that are written whole; errors.py: mistakes of the user
"""
