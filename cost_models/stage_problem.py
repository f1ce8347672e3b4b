from planner.stage_problem import *  # noqa
