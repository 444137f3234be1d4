# Counts, rewrites and sorts the text's words, without modules.
import sys

count = {}
length = 0
for line in open(sys.argv[1]):
    for word in line.split():
        count[word] = count.get(word, 0) + 1
        length += len(word.replace("e", "ea").upper().partition("A")[0])
print(length)
for word, n in sorted(count.items(), key=lambda item: (item[1], item[0])):
    print(f"{word}={n}")
