"""Plans: every stage's program compiled ahead of time for devices that are not present, and its memory and time.

command.py prints them; stage_programs.py lists what the stages run, topology.py the devices, compiler.py the results.
"""
