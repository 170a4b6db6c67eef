"""What a run needs before it is started: memory, steps, time, money, and which setting to change.
Arithmetic only, no torch.

`plan.plan_recipe` is the way in, `plan.plan_launched` where the launch is known. Nothing here
starts or loads anything.
"""
