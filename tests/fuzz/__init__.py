"""Random programs, run in eager and through the backend, must give the same.

program.py    a program as data, rendered as a script
pieces.py     the parametrizations and control flow that scripts are made of
generate.py   from a seed to a program: its modules, its modes
grammar.py    from a seed to a program: its statements
run.py        one program, one way: all that can be seen of it
judge.py      several ways compared: who is wrong
campaign.py   many programs, counted
shrink.py     a failing program made small
mutate.py     a rule of sharing switched off: do the programs notice?
"""
