# Started on every node: bash torchrun.sh NODE HEAD:PORT, with NODE from 0 (the head) to the number of nodes less one.

case ${1:-}:${2:-} in
    [0-9]*:?*:[0-9]*) ;;
    *)
        echo "moexpand: start this as bash $0 NODE HEAD:PORT on each of $NODES nodes, NODE from 0 to $((NODES - 1))." >&2
        exit 2
        ;;
esac
exec "${WORKERS[@]}" --node "$1" --endpoint "$2" --job "$2"
