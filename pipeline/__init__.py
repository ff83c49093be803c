"""
The program around the algorithms.

    config.py       every setting, once, and the command line
    stages.py       one function for each stage of RLHF: the place where the algorithms are put together
    run.py          what the stages leave for each other in the folder of a run, and a training loop within it
    folder.py       how a run begins, continues, or takes over stages of another one
    scores.py       the true reward, and the score that policies maximise
    report.py       what is printed at the end; diagnose.py: its states in words; page.py: the page
    episode.py      single answers, token by token
    pairs.py        preference files of any form; own.py: a pretrained model or a reward function of the user
    files.py        files that are written whole; errors.py: mistakes of the user
"""
