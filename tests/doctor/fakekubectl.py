"""A fake kubectl for the commands that the doctor runs. Tests copy it onto PATH, next to a file with its objects.

The real kubectl gives the same answers; tests/cluster runs it against a real API server.
"""

import json
import sys
from pathlib import Path

KINDS = {
    "pods": ("Pod",),
    "deployments.apps,statefulsets.apps": ("Deployment", "StatefulSet"),
    "persistentvolumeclaims": ("PersistentVolumeClaim",),
    "jobs.batch": ("Job",),
    "horizontalpodautoscalers.autoscaling": ("HorizontalPodAutoscaler",),
    "events": ("Event",),
    "secrets": ("Secret",),
}


def main() -> int:
    cluster = json.loads(Path(__file__).with_name("cluster.json").read_text())
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    match words:
        case ["config", "view"]:
            print("team-a", end="")
        case ["create"]:
            reviews = json.load(sys.stdin)["items"]
            for review in reviews:  # one answer after the other, like the real kubectl
                attributes = review["spec"]["resourceAttributes"]
                review["status"] = {"allowed": attributes["resource"] not in cluster["forbidden"]}
                print(json.dumps(review, indent=4))
        case ["get", kinds, *names]:
            if cluster.get("down"):
                print("The connection to the server localhost:8080 was refused", file=sys.stderr)
                return 1
            if kinds in cluster["forbidden"]:
                print(f'Error from server (Forbidden): {kinds} is forbidden: User "eve"', file=sys.stderr)
                return 1
            found = [
                one
                for one in cluster["objects"]
                if one["kind"] in KINDS[kinds] and (not names or one["metadata"]["name"] in names)
            ]
            if len(names) and len(found) == 1:
                print(json.dumps(found[0]))  # the real kubectl makes no list of an object requested by name
            elif found or not names:
                print(json.dumps({"apiVersion": "v1", "kind": "List", "items": found}))
        case ["exec", "deployment/mesh-router", *_]:
            print(cluster["inside"])
            return 1
        case _:
            print(f"error: unknown command {words}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
