-- Counts, rewrites and sorts the text's words.
local count, words, length = {}, {}, 0
for line in io.lines(arg[1]) do
    for word in line:gmatch("%S+") do
        if not count[word] then
            words[#words + 1] = word
        end
        count[word] = (count[word] or 0) + 1
        length = length + #word:gsub("(%a+)(%d+)", "%2-%1")
    end
end
table.sort(words, function(a, b)
    return count[a] < count[b] or (count[a] == count[b] and a < b)
end)
print(length)
for _, word in ipairs(words) do
    print(word .. "=" .. count[word])
end
