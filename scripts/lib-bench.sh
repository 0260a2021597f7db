# Shared by the benchmarks of this folder; sourced after lib.sh, never run.
# shellcheck shell=bash
#
# What is measured lies in files of $out: a number per line, or `failed`; further columns are chosen as FILE:COLUMN. A row of the
# table has the median of ours and of a peer's, the least and the most of each, and the ratio of the medians: ours / peer's.
# With BENCH_ROWS set, each row is also added to that file, tab separated, from which docs/benchmarks.md is made (scripts/bench).

# prepare [SETUP-OPTION...] -- CARGO-ARGUMENT...: the peers and the programs of a benchmark; scripts/bench has made all of them at once
prepare() {
    local options=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    cd "$ROOT" || return
    [ -z "${BENCH_ROWS:-}" ] || return 0
    "$ROOT/scripts/setup" "${options[@]}"
    step "build" cargo build --locked --release "$@"
}

# count VALUE SCRIPT: ends the script unless the value is a positive number
count() { [[ $1 =~ ^[1-9][0-9]*$ ]] || die "'$1' is not a number" "scripts/$2 -h"; }

# spread FILE[:COLUMN]: median, least, most, how many counted, how many failed; tab separated
spread() {
    local file=${1%:*} column=1
    [ "$file" = "$1" ] || column=${1##*:}
    awk -v c="$column" '$1 != "failed" { print $c }' "$file" | sort -g | awk -v OFS='\t' -v failed="$(grep -c '^failed' "$file")" '
        { all[NR] = $1 }
        END { if (NR) print all[int((NR + 1) / 2)], all[1], all[NR], NR, failed; else print "-", "-", "-", 0, failed }'
}

group_of_rows=
# group NAME: what the rows from here on belong to
group() {
    [ "$group_of_rows" != "$1" ] || return 0
    group_of_rows=$1
    printf '%-58s %30s %30s %8s\n' "$1" "ice (least to most)" "peer (least to most)" ratio
}

# row TITLE UNIT less|more OURS [PEER THEIRS] [GOAL]: a line of the table. UNIT is what the numbers of the files are; less or more
# is better. PEER is its name, THEIRS its file. A goal with an x is one of the ratio (0.25x), without it of our own number.
row() {
    local title=$1 unit=$2 better=$3 ours=$4 peer=- theirs=$'-\t-\t-\t0\t0' goal=-
    shift 4
    if [ $# -ge 2 ]; then
        peer=$1 theirs=$(spread "$2")
        shift 2
    fi
    [ $# -eq 0 ] || goal=$1
    ours=$(spread "$ours")
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$title" "$unit" "$better" "$ours" "$peer" "$theirs" | awk -F'\t' '
        function number(v) { return v == "-" ? "-" : sprintf(v + 0 >= 100 ? "%.0f" : v + 0 >= 1 ? "%.2f" : "%.3f", v) }
        function side(m, l, h, n, f, text) {
            text = n ? number(m) (n > 1 ? " (" number(l) " to " number(h) ")" : "") : "-"
            return f ? text ", failed " f "x" : text
        }
        {
            ratio = $4 + 0 && $10 + 0 ? sprintf("%.2fx", $4 / $10) : "-"
            peer = $9 == "-" ? "-" : $9 " " side($10, $11, $12, $13, $14)
            printf "%-58s %30s %30s %8s\n", $1 " [" $2 "]", side($4, $5, $6, $7, $8), peer, ratio
        }'
    [ -z "${BENCH_ROWS:-}" ] ||
        printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$group_of_rows" "$title" "$unit" "$better" "$ours" "$peer" "$theirs" "$goal" >>"$BENCH_ROWS"
}
