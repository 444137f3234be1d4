-- Fills, indexes, groups and joins a table of 20000 rows.
create table words(id integer primary key, word text, n integer);
with recursive c(i) as (select 1 union all select i+1 from c where i < 20000) insert into words select i, 'w' || (i*7919 % 10007), i*31 % 1000 from c;
create index by_word on words(word);
select count(*), sum(n) from words;
select n % 10, count(*), sum(id) from words group by 1 order by 1;
select a.word, count(*) from words a join words b on a.word = b.word where a.id < b.id and a.n < 100 group by 1 order by 2 desc, 1 limit 10;
