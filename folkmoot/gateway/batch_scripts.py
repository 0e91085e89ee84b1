"""The state machine of batches, as Lua scripts: each runs atomically in the store, so every rule holds whoever dies.

    (create) -> validating -> in_progress -> finalizing -> completed
                    |              |              `------> expired
                    `-> failed     `-> cancelling -------> cancelled

    - One gateway at a time runs a batch, under a lease with an epoch; what an earlier holder says is refused.
    - A line's first result is its only one (the bitmap `done`), and with it goes the request that made it.
    - A batch that has ended is out of `batches:open`, without its input, and expires.

KEYS[1] is the hash tag, times are the store's clock, as in scripts.py.
"""

from folkmoot.gateway.prelude import PRELUDE

# Batch hash: status tenant endpoint metadata limits digest window created deadline input_bytes total output errors
#             faults estimated estimates epoch runner leased_until <status>_at prompt_tokens completion_tokens
#             rate_lines rate_tokens retention outcome trace
COMMON = (
    PRELUDE
    + """
local open_key, all_key = root .. ':batches:open', root .. ':batches'
local function batch_key(id) return root .. ':batch:' .. id end
local function part_key(id, part) return root .. ':batch:' .. id .. ':' .. part end

-- Whether the caller's lease of a batch is the newest.
local function holds(id, epoch) return redis.call('HGET', batch_key(id), 'epoch') == epoch end

-- A request that is not wanted any more: ended where it still waits or runs, and gone.
local function forget(request)
  local r = read(request)
  if not r then return end
  if r.state ~= 'done' then close(request, r, r.next, finish(r.next, CANCELLED, 1, 'its batch has ended'), 0) end
  redis.call('UNLINK', request_key(request), journal_key(request))
end
"""
)

# ARGV: id, upload ('' = the file has no lines), digest, window ms, retention ms, then pairs of fields.
# Returns ok | same | taken.
CREATE = (
    COMMON
    + """
local id, upload, digest = ARGV[1], ARGV[2], ARGV[3]
local known = redis.call('HGET', batch_key(id), 'digest')
if known then
  if upload ~= '' then redis.call('UNLINK', part_key(id, 'input:' .. upload)) end
  return known == digest and 'same' or 'taken'
end
if upload ~= '' then
  redis.call('RENAME', part_key(id, 'input:' .. upload), part_key(id, 'input'))
  redis.call('PERSIST', part_key(id, 'input'))
end
local deadline = now + tonumber(ARGV[4])
redis.call('HSET', batch_key(id), 'status', 'validating', 'digest', digest, 'created', now, 'deadline', deadline,
           'window', ARGV[4], 'retention', ARGV[5], 'epoch', 0, 'leased_until', 0)
for i = 6, #ARGV, 2 do redis.call('HSET', batch_key(id), ARGV[i], ARGV[i + 1]) end
for _, old in ipairs(redis.call('ZRANGE', all_key, 0, 1)) do  -- two for each that comes: what has expired goes
  if redis.call('EXISTS', batch_key(old)) == 0 then redis.call('ZREM', all_key, old) end
end
redis.call('ZADD', all_key, clock[1] .. string.format('%06d', clock[2]), id)
redis.call('ZADD', open_key, deadline, id)
return 'ok'
"""
)

# The batch of the earliest deadline that nobody runs. ARGV: gateway, lease ms. Returns nil, or id, epoch.
CLAIM = (
    COMMON
    + """
for _, id in ipairs(redis.call('ZRANGE', open_key, 0, -1)) do
  local leased_until = redis.call('HGET', batch_key(id), 'leased_until')
  if not leased_until then
    redis.call('ZREM', open_key, id)
  elseif now >= tonumber(leased_until) then
    local epoch = redis.call('HINCRBY', batch_key(id), 'epoch', 1)
    redis.call('HSET', batch_key(id), 'runner', ARGV[1], 'leased_until', now + tonumber(ARGV[2]))
    return {id, epoch}
  end
end
return false
"""
)

# ARGV: id, epoch, lease ms (0: give it up), lines a second, tokens a second. Returns nil where the lease is lost, else
# the status and how many ms are left until the deadline.
RENEW = (
    COMMON
    + """
local id, epoch, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not holds(id, epoch) then return false end
redis.call('HSET', batch_key(id), 'leased_until', now + lease_ms, 'rate_lines', ARGV[4], 'rate_tokens', ARGV[5])
local values = redis.call('HMGET', batch_key(id), 'status', 'deadline')
return {values[1], tonumber(values[2]) - now}
"""
)

# ARGV: id, epoch, statuses it may come from (joined by spaces), new status, then pairs of fields. Returns the status
# that it has now; nil where the lease is lost.
MOVE = (
    COMMON
    + """
local id, epoch, from, to = ARGV[1], ARGV[2], ' ' .. ARGV[3] .. ' ', ARGV[4]
if not holds(id, epoch) then return false end
local key = batch_key(id)
local status = redis.call('HGET', key, 'status')
if not string.find(from, ' ' .. status .. ' ', 1, true) then return status end
redis.call('HSET', key, 'status', to, to .. '_at', now)
for i = 5, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
if to == 'completed' or to == 'failed' or to == 'expired' or to == 'cancelled' then
  redis.call('HINCRBY', root .. ':counts', 'batches_' .. to, 1)
  local retention = tonumber(redis.call('HGET', key, 'retention'))
  redis.call('ZREM', open_key, id)
  redis.call('UNLINK', part_key(id, 'input'), part_key(id, 'done'), part_key(id, 'retries'))
  redis.call('HSET', key, 'leased_until', 0, 'runner', '', 'ended', now, 'expires', now + retention)
  for _, name in ipairs({key, part_key(id, 'output'), part_key(id, 'errors')}) do
    redis.call('PEXPIRE', name, retention)
  end
end
return to
"""
)

# Results of lines. ARGV: id, epoch, then per line: index, request, file (output or errors), payload, prompt tokens,
# completion tokens. Returns nil where the lease is lost, else how many were news.
WRITE = (
    COMMON
    + """
local id, epoch = ARGV[1], ARGV[2]
if not holds(id, epoch) then return false end
local key, news = batch_key(id), 0
for i = 3, #ARGV, 6 do
  local line, request, file, payload = unpack(ARGV, i, i + 3)
  if redis.call('SETBIT', part_key(id, 'done'), line, 1) == 0 then
    local at = redis.call('HINCRBY', key, file, 1) - 1
    redis.call('XADD', part_key(id, file), at .. '-1', 'd', payload)
    redis.call('HINCRBY', key, 'prompt_tokens', ARGV[i + 4])
    redis.call('HINCRBY', key, 'completion_tokens', ARGV[i + 5])
    redis.call('HINCRBY', root .. ':counts', 'lines_' .. file, 1)
    news = news + 1
  end
  forget(request)
end
flush()
return news
"""
)

# ARGV: most bytes to answer, look at deadlines too (0 or 1), then requests. Returns for those that have ended, or are
# unknown: index among them from 0, journal payloads (nil: unknown); before all that, how many were looked at.
COLLECT = (
    COMMON
    + """
local room, look = tonumber(ARGV[1]), ARGV[2] == '1'
local out, seen = {}, 0
for i = 3, #ARGV do
  if room <= 0 then break end
  seen = seen + 1
  local state = redis.call('HGET', request_key(ARGV[i]), 'state')
  if look and state and state ~= 'done' and over(ARGV[i], read(ARGV[i])) then state = 'done' end
  if not state then
    out[#out + 1] = {i - 3, false}
  elseif state == 'done' then
    local payloads = {}
    for _, item in ipairs(redis.call('XRANGE', journal_key(ARGV[i]), '-', '+')) do
      payloads[#payloads + 1] = item[2][2]
      room = room - #item[2][2]
    end
    out[#out + 1] = {i - 3, payloads}
  end
end
flush()
return {seen, out}
"""
)

# A line is to be asked again. ARGV: id, epoch, line, request. Returns nil where the lease is lost, else how often that
# has happened to the line.
AGAIN = (
    COMMON
    + """
local id, epoch = ARGV[1], ARGV[2]
if not holds(id, epoch) then return false end
forget(ARGV[4])
flush()
return redis.call('HINCRBY', part_key(id, 'retries'), ARGV[3], 1)
"""
)

# ARGV: id. Returns nil where it is unknown.
CANCEL = (
    COMMON
    + """
local key = batch_key(ARGV[1])
local status = redis.call('HGET', key, 'status')
if not status then return false end
if status == 'validating' or status == 'in_progress' then
  redis.call('HSET', key, 'status', 'cancelling', 'cancelling_at', now)
end
return true
"""
)

# A page of batches, the newest first. ARGV: tenant ('' = all), before (a score, '' = from the newest), how many.
# Returns ids, and the score to go on before ('' = no more). What has expired is taken off the list.
LIST = (
    COMMON
    + """
local tenant, before, wanted = ARGV[1], ARGV[2], tonumber(ARGV[3])
local ids, from = {}, before == '' and '+inf' or ('(' .. before)
while true do
  local found = redis.call('ZREVRANGEBYSCORE', all_key, from, '-inf', 'WITHSCORES', 'LIMIT', 0, 100)
  for i = 1, #found, 2 do
    if #ids >= wanted then return {ids, before} end
    local id = found[i]
    local owner = redis.call('HGET', batch_key(id), 'tenant')
    if not owner then
      redis.call('ZREM', all_key, id)
    elseif tenant == '' or owner == tenant then
      ids[#ids + 1] = id
    end
    before = found[i + 1]
    from = '(' .. before
  end
  if #found < 200 then return {ids, ''} end
end
"""
)

BATCHES = {
    "batch_create": CREATE,
    "batch_claim": CLAIM,
    "batch_renew": RENEW,
    "batch_move": MOVE,
    "batch_write": WRITE,
    "batch_collect": COLLECT,
    "batch_again": AGAIN,
    "batch_cancel": CANCEL,
    "batch_list": LIST,
}
