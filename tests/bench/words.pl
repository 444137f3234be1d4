# Counts, rewrites and sorts the text's words.
my (%count, $length); # no `use`: the guest has no modules
while (<>) {
    for (split) {
        $count{$_}++;
        s/([a-z]+)(\d+)/$2-$1/;
        $length += length;
    }
}
print "$length\n";
print "$_=$count{$_}\n" for sort { $count{$a} <=> $count{$b} || $a cmp $b } keys %count;
