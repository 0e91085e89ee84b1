"""What the store tells of queue and batches at a scrape, in Lua: counters and lengths, and no look at any request."""

# ARGV: how many open batches to look at. Returns JSON: see QueueFigures. It takes one step for each model, engine, open
# batch, and source of work outside the queue.
FIGURES = """
local root, most = KEYS[1], tonumber(ARGV[1])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function numbers(key)
  local found, flat = {}, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do found[flat[i]] = tonumber(flat[i + 1]) end
  return found
end

local function of_lane(model, lane)
  local function key(kind) return root .. ':' .. kind .. ':' .. model .. ':' .. lane end
  local first = redis.call('XRANGE', key('queue'), '-', '+', 'COUNT', 1)[1]
  return {
    model = model,
    lane = lane,
    counters = numbers(key('load')),
    oldest_ms = first and now - tonumber(string.match(first[1], '%d+')) or 0,
    leases = redis.call('ZCOUNT', key('leases'), '(0', '+inf'),
    handed_back = redis.call('ZCOUNT', key('leases'), 0, 0) + redis.call('ZCARD', key('last')),
    tenants = redis.call('ZCARD', key('tenants')),
  }
end

-- Tokens of work that is kept outside the queue: see Demands.owe.
local function outside(model)
  local tokens = 0
  for _, text in ipairs(redis.call('HVALS', root .. ':owed:' .. model)) do
    local owed = cjson.decode(text)
    if owed[3] * 1000 >= now then tokens = tokens + owed[1] end
  end
  return tokens
end

local lanes, models = {}, {}
for _, model in ipairs(redis.call('HKEYS', root .. ':models')) do
  models[model] = {dead = redis.call('XLEN', root .. ':dead:' .. model), outside = outside(model), ready = 0, other = 0}
  for _, lane in ipairs({'interactive', 'batch'}) do lanes[#lanes + 1] = of_lane(model, lane) end
end
for _, engine in ipairs(redis.call('ZRANGE', root .. ':engines', now, '+inf', 'BYSCORE')) do
  local model = models[redis.call('HGET', root .. ':engine-models', engine)]
  local state = redis.call('EXISTS', root .. ':ready:' .. engine) == 1 and 'ready' or 'other'
  if model then model[state] = model[state] + 1 end
end

local open = {}
for _, id in ipairs(redis.call('ZRANGE', root .. ':batches:open', 0, most - 1)) do
  local status = redis.call('HGET', root .. ':batch:' .. id, 'status')
  if status then open[status] = (open[status] or 0) + 1 end
end
return cjson.encode({lanes = lanes, models = models, open = open, counts = numbers(root .. ':counts')})
"""
