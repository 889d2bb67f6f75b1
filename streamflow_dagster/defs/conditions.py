"""When an asset is made again by itself."""

from dagster import AutomationCondition

WHEN_REMADE = (
    AutomationCondition.eager().without(AutomationCondition.in_latest_time_window()) & ~AutomationCondition.missing()
).with_label("what it is made from has been made again")
"""As soon as something upstream of a month was made anew, in whichever month, and nothing upstream is missing.

What has never been made of a month the landing sensor asks for, when its time has come.
"""
