# Counts the text's words by their first three letters.
{ for (i = 2; i <= NF; i++) count[substr($i, 1, 3)]++ }
END {
    for (word in count) { sum += count[word] * length(word); kinds++ }
    print sum, kinds
}
