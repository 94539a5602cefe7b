#!/bin/sh
# Ask phi3v about a picture with curl:  PHI3V_KEY=phi3v_… examples/ask.sh "What is shown in this image?" picture.png
# PHI3V_URL (https://localhost:8000) and PHI3V_CERT (server.crt) say where the server is and what proves it.
set -eu
[ $# -eq 2 ] && [ -r "$2" ] || { echo "usage: PHI3V_KEY=... $0 QUESTION PICTURE" >&2; exit 2; }
: "${PHI3V_KEY:?set it to an API key; make one with: phi3v create --name curl}"
# The question travels inside a JSON string: backslashes and quotes are escaped.
question=$(printf '%s' "$1" | tr '\n' ' ' | sed 's/\\/\\\\/g; s/"/\\"/g')
picture=$(base64 < "$2" | tr -d '\n')
# The body goes through standard input: a picture is too long for an argument.
printf '{"prompt": "%s", "images": ["%s"]}' "$question" "$picture" |
  curl --silent --show-error --fail-with-body --cacert "${PHI3V_CERT:-server.crt}" "${PHI3V_URL:-https://localhost:8000}/v1/completions" \
    -H 'Content-Type: application/json' -H "X-API-Key: $PHI3V_KEY" --data-binary @-
echo
