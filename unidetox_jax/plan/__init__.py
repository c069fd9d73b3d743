"""Plans: every stage's program compiled ahead of time for devices that are not present, and its memory and time.

command.py prints them; stage_programs.py lists what the stages run, abstract_programs.py lowers it, topology.py has the
devices, compiler.py and hlo.py read the compiled programs, cost_model.py estimates their time, auto_mesh.py chooses
the stages' meshes by that, also of real runs, and feasibility.py says what would make a program fit.
"""
