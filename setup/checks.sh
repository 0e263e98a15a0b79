#!/bin/sh
# Runs checks one after the other, all of them even if one fails, and ends with the closing lines of each.
# Usage: setup/checks.sh DIRECTORY NAME=COMMAND...     (the logs go to DIRECTORY/NAME.log)
set -u
logs=$1
shift
mkdir -p "$logs"
summary=$logs/summary
: >"$summary"
failed=

for check in "$@"; do
    name=${check%%=*}
    command=${check#*=}
    printf '\n==> %s: %s\n' "$name" "$command"
    begin=$(date +%s)
    { sh -c "$command" 2>&1; echo $? >"$logs/$name.status"; } | tee "$logs/$name.log"
    status=$(cat "$logs/$name.status")
    seconds=$(($(date +%s) - begin))
    word=passed
    if [ "$status" != 0 ]; then
        word="FAILED ($status)"
        failed="$failed $name"
    fi
    {
        printf '%-10s %s in %s s\n' "$name" "$word" "$seconds"
        # What the runners said last: cargo test, cargo nextest, pytest; and the lab, if it had to be started again.
        grep -aE '^test result: |^ +Summary \[|^=+ .*(passed|failed|error|no tests).* =+$|^FAILED |^ERROR |^lab: .* died' "$logs/$name.log" |
            sed 's/^/    /' || true
    } >>"$summary"
done

printf '\n==> summary\n'
cat "$summary"
if [ -n "$failed" ]; then
    printf 'Failed:%s. The whole of each log: %s/NAME.log\n' "$failed" "$logs"
    exit 1
fi
