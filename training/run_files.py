"""Names of the files that a run leaves in its directory; `tracking/oscillation_csv.py` has the name of its own."""

LOG = "log.txt"
DLLOGGER = "dllogger.json"
TENSORBOARD = "tensorboard"
REPORT = "report.html"
LAST_CHECKPOINT, BEST_CHECKPOINT = "checkpoint.pth", "best_checkpoint.pth"
