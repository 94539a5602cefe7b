"""Ask phi3v about a picture, with Python's standard library alone.

    PHI3V_KEY=phi3v_… python examples/ask.py "What is shown in this image?" picture.png [more.png …]

PHI3V_URL (https://localhost:8000) and PHI3V_CERT (server.crt) say where the server is and what proves it.
"""

import base64
import json
import os
import ssl
import sys
import urllib.error
import urllib.request


def ask(question: str, pictures: list[str]) -> str:
    url = os.environ.get("PHI3V_URL", "https://localhost:8000")
    body = {"prompt": question, "max_tokens": 256}
    if pictures:
        body["images"] = [base64.b64encode(open(path, "rb").read()).decode() for path in pictures]
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "X-API-Key": os.environ["PHI3V_KEY"]},
    )
    # The server's own certificate is all that is trusted: no -k, no verify=False.
    certificate = os.environ.get("PHI3V_CERT", "server.crt")
    if not os.path.exists(certificate):
        sys.exit(f"ask.py: there is no {certificate} here: set PHI3V_CERT to the server's certificate")
    context = ssl.create_default_context(cafile=certificate)
    with urllib.request.urlopen(request, context=context) as reply:
        return json.load(reply)["responses"][0]


if __name__ == "__main__":
    if len(sys.argv) < 2 or "PHI3V_KEY" not in os.environ:
        sys.exit(__doc__)
    try:
        print(ask(sys.argv[1], sys.argv[2:]))
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {json.load(error)['error']['message']}")
    except OSError as error:  # no such picture, no server, a certificate that is not to be trusted
        sys.exit(f"ask.py: {error}")
