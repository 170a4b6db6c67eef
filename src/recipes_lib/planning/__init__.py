"""What a run needs before it is started: memory, steps, time, money, and which setting to change. Arithmetic only, no torch.

`plan.plan_recipe` is the way in; `walltime.planned_walltime` is what a job script asks for. Nothing here starts or loads anything.
"""
