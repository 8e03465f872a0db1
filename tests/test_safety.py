"""Safety: what a reader never sees, and who is answered by us instead of a model."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import assistant, user

from studytiny import DialogueModel, Generator, SamplingConfig, Tokenizer, UserError
from studytiny.generator import Step
from studytiny.safety import FILTER_VARIABLE, HELP, POLITE, REDRAWN, help_for, is_filter_on, safe_stream
from studytiny.word_lists import CRISIS_WORDS_FILE, RUDE_WORDS_FILE, is_rude, speaks_of_suicide

POLITE_SENTENCES = [sentence for pair in POLITE for sentence in pair]
ASKED = [user("你好")]
SEED = SamplingConfig(seed=7)

# What people in danger, or worried about somebody, write.
IN_DANGER = """
不想活了；我不想活了；真的不想活了怎么办；活着没意思；活着真没意思；感觉活着没什么意义；活着好累啊；活着太累了；
人活着到底为了什么；我想死；好想死；想死了算了；我真的好想死啊；有时候会想死；我想去死；不如死了算了；还不如死了；
死了就解脱了；死了是不是就不疼了；我死了会有人难过吗；如果我死了你会想我吗；要是我不在了他们会不会开心；自杀；
我想自杀；怎么自杀不痛；我朋友说要自杀，我该怎么办；我有自杀的念头；自殺；我想自 杀；自鲨；紫砂了；割腕；
我刚刚割腕了；想割自己；我又划手腕了；用刀片划自己会好受一点；拿美工刀划胳膊；自残；我忍不住自残；控制不住伤害自己；
跳楼；想跳楼；想从楼上跳下去；站在天台上想跳；从几楼跳下去会死；跳江；想跳河；我想跳桥；卧轨；上吊；想上吊；烧炭自杀；
喝农药；吃多少安眠药会死；吞了一瓶安眠药；一整瓶药吃下去会怎样；遗书；我写好遗书了；怎么写遗书；想结束自己的生命；
结束生命；想结束这一切；好想结束这一切；了结自己；想离开这个世界；准备和这个世界告别了；再见了这个世界；想消失；
好想从这个世界上消失；我消失了会更好吧；没有我大家会过得更好；没有我爸妈会轻松很多；我就是个累赘；我是家里的负担；
我不该来到这个世界；要是没出生就好了；活不下去了；我快撑不下去了；实在熬不下去了；活够了；我活腻了；活着就是受罪；
不知道为什么要活着；我找不到活下去的理由；没有活下去的勇气；人生没有意义；生活没什么盼头了；每天都在想死；
满脑子都是死；希望明天不要醒来；真想一觉睡过去再也不醒；不想醒过来了永远；一了百了；轻生；有轻生的念头；寻短见；
怎么死比较舒服；怎样死才不痛苦；哪种死法最不疼；想解脱；只想快点解脱；死了没人在乎；我不配活着；我这种人不值得活；
活得好累想死；不想活在这个世界上了；想4了；不想活了😭；我准备好后事了；弄死自己算了；i want to die；I wanna die；
kill myself；I'm going to kill myself；suicide；I feel suicidal；I don't want to live anymore；i dont wanna live；
end my life；I just want to end it all；I want to hurt myself；i keep cutting myself；better off dead；
nobody would miss me if i was gone；no reason to live；I wish I was never born；i wish i were dead；
how to kill yourself；kms；I can't go on anymore；我觉得死亡是唯一的出路；感觉自己撑不住了，想去另一个世界；
我想从桥上跳下去；我已经不想继续活了；有没有不痛的自杀方法；我同学跳楼了，我好怕；同桌手臂上全是划痕，她说自己在自残；
我又伤害自己了；我买了一瓶农药；活着对我来说就是煎熬；活着干嘛呢；我不知道活着为了什么；我活得好痛苦；
我该死，我真的应该死掉；等我死了你们就高兴了；后悔被生下来；我不想存在了；明天不想醒来了，永远不想；这个世界不需要我；
我要去另一个世界了；下辈子再做你们的女儿；我站在楼顶；我在桥上，不想回去了；想被车撞死；出门被车撞死就好了；
有没有什么药吃了就睡过去醒不来；哪里可以安乐死；失恋了不想活；欠了好多钱，只有死路一条；爸妈不要我了我想死；
老公打我，我想死；真想死了一了百了；我厌倦了活着；我讨厌活着；活得没意思；世界再见；想似；我 想 死；我要上吊；
i want to disappear forever；life is not worth living；thinking about suicide；I've been self harming；
I want to jump off a bridge；I don't want to be here anymore；I want to end my life；whats the point of living；
突然觉得死了也挺好；其实我想过死；要不我去死吧；我去死好了；没有人爱我，我不想活；我想睡一觉就不要醒来了；
好想就这么死掉；想在安静的地方结束自己；十楼跳下去会很痛吗；我割了手腕，流了好多血；我手上都是刀疤，忍不住又划了；
掐自己掐到流血才舒服；我把药都吃了；我把一瓶头孢和酒一起喝了；喝敌敌畏多久会死；我写了遗书放在桌上；
请照顾好我爸妈，我走了；再见了妈妈，我不想再痛苦了；我对这个世界没有留恋了；活着一点意思都没有；活着真的好辛苦；
我为啥要活着受苦；谁来杀了我吧；帮我结束痛苦吧，我想死；没有我这个世界会更好；我死后会有人记得我吗；我姐姐自杀了；
他说他想跳河我该怎么办；女朋友以死相逼；我抑郁了，不想活下去；被网暴到想自杀；站在桥上想跳；让我消失吧；
不想在这个世界上了；i'm gonna kill myself tonight；i want to be dead；I don't see the point in living；
I took a whole bottle of pills；I want to slit my wrists；我真的撑不下去了；我想结束这条命；真的很想离开这个世界；
活着只会拖累别人；如果没有我，你们会不会过得好一点；我已经不想再坚持了，想死；有没有没痛苦的死法；我在想要不要跳下去；
想躺在铁轨上；我把遗书发给朋友了；忍不住又割腕了；手腕上又多了几道疤，我自己划的；我对生活彻底绝望，不想活；
每晚都想从窗户跳下去；死了是不是就没有烦恼了；我爸妈逼得我想自杀；老师，我同学说他想死；朋友发消息说他不想活了怎么办；
我好累，想睡着再也不醒；觉得自己不配活在世上；我想死，可是又怕疼；吃安眠药自杀会难受吗；我没救了，死了算了；
反正也没人在乎我死不死；我死不死都无所谓；怎么才能去死；我恨自己，想伤害自己；我用烟头烫自己；我想把自己弄死；
我的人生没有任何意义；生无可恋，想去死；求求谁带我走吧，我不想活；活腻歪了；这辈子就到这里吧；
我决定今晚走了，谢谢你陪我；不想看到明天了；I feel like ending my life；there is no point in living anymore；
I've been thinking about killing myself；I can't do this anymore i want to die
"""

# What people write who are not.
HARMLESS = """
笑死我了；笑死；哈哈哈笑死了；累死了；今天累死我了；热死了；热死个人；冷死了；饿死了；我快饿死了；困死；困死了想睡觉；
想死你了；可想死我了；想死妈妈做的菜了；气死我了；烦死了；吓死我了；急死人了；打死我也不去；打死都不吃香菜；
打游戏死了；游戏里又死了；游戏里死了好几次；我在游戏里自杀了一次；死机了；电脑死机怎么办；他是我死党；我和死党吵架了；
死心吧；我对他死心了；死循环怎么写；这道题是死记硬背的；要死要活的考试；考试考得要死要活；作业多得要死；贵得要死；
难死了；美死了；羡慕死我了；爱死你了；无聊死了；疼死我了；花死了怎么办；我的鱼死了；小狗死了好难过；爷爷去世了；
人死了会去哪里；恐龙是怎么死的；死海在哪里；想去死海旅游；死神来了好看吗；跳楼价；跳楼机好玩吗；清仓大甩卖跳楼价；
早上吊了一瓶水；上吊床睡觉；路上吊车坏了；年轻生活真好；减轻生活压力；紫砂壶怎么养；紫砂茶具；割草机；割麦子；
自杀小队好看吗；自杀式袭击是什么；今天不想活动；不想活成别人的样子；没有空调我活不下去；没有手机活不了；
没有奶茶我活不下去了；这鱼还能活吗；多肉怎么养活；活着真好；活着就有希望；好好活着；活到老学到老；你会死吗；你怕死吗；
我怕死；我不想死；谁想死啊；活动取消了；生活真美好；生活的意义是什么；你活着吗；我想消灭这些零食；痘痘怎么消失；
尴尬得我想消失；想静静；想家了；想睡到自然醒；不想起床；不想醒来上班；周末不想早起；坚持不下去了，跑步太累；
减肥坚持不下去；作业写不下去了；想不开去考研；怎么这么想不开选了数学；切菜割到手了；不小心划到手指；跳绳；跳水比赛；
跳河里游泳；蹦极跳下去好怕；猫从阳台跳下来了；烧炭烤肉；老鼠药放哪里；狗吃巧克力会死吗；医生开了安眠药；吃药了吗；
死鬼你怎么才来；该死的蚊子；你这个死鬼；社死了；当场社死；emo了；今天好累；压力好大；不开心；我好孤独；
最后期限要死了；死活不同意；死缠烂打；死磕到底；想死磕这道题；死里逃生；不是你死就是我亡；生死看淡；视死如归什么意思；
你去死吧；高考终于解脱了；世界那么大我想去看看；我想离开这个城市；结束了一天的工作；会议结束了；割韭菜；
我要死了哈哈哈作业好多；die hard is a good movie；I'm dying of laughter；this food is to die for；I ran 5 kms；
my phone died；suicide squad movie；I cut myself a slice of cake；killing time；deadline is killing me；hello；
I hate mondays；好想吃火锅；笑不活了家人们；笑到想死；尴尬得想死；今天热得要死；丑死了；忙死了忙死了；蚊子咬死我了；
我死定了，忘带作业；老师要杀了我；你想死啊；去死吧你；死也不吃苦瓜；宁死不屈是什么意思；这把又死了；老是第一个死；
王者里一直死；死胡同；死海为什么浮起来；半死不活的花；救活了一只小鸟；金鱼总是死怎么办；外婆离开我们了；爷爷生病了；
离开人世的外公；人为什么会死；活着的意义是什么；为什么要活动筋骨；我想活到一百岁；好想活成一只猫；不想上班；不想说话；
不想长大；想放弃这门课；我放弃了；人生真无聊啊；好累啊今天；压力大到睡不着；我想睡觉了再见；睡不醒怎么办；
睡死过去了没听到闹钟；我想逃离上班；想原地消失；钱消失了；跳远；我想跳槽；楼下跳广场舞；从床上跳下来；桥上风景好美；
爬上楼顶看日落；开车撞到墙了；烦得想撞墙；用刀切水果；割双眼皮疼吗；划水摸鱼；药好苦；头疼吃几片布洛芬；
睡不着要吃安眠药吗；遗憾；结束语怎么写；我和他结束了；断了联系；杀死细菌；自我介绍怎么写；自习；我就是个废物；
我好差劲；负担好重；终于放假了解脱；看开点；生无可恋地上班；绝绝子；摆烂；我人没了；我裂开了；社恐；求求了让我睡吧；
that joke killed me；dying to see you；how to kill a process in linux；I died in the game again；live your life；
i want to go home；I want to diet；jump off the couch；死神永生是第几部；僵尸怎么打死；怎么杀死蚂蚁；他装死；
小强死了吗；没电关机了；懒得要死；我要困死了；吓得半死；笑得半死；我要笑死；笑鼠我了；累鼠了；我真的会谢；哭死；
我嗑死了；磕死我了；好吃死了；难吃死了；尴尬死我了；恨死他了；我想死你们了；想死外婆家的菜了；死水微澜是谁写的；
九死一生；哭得死去活来；活该；活动方案；活泼；快活；活力满满；养不活绿植；干不完的活；不想干活了；没活干；
找不到工作，没有动力；没力气了；生活没意思；好没意思啊；生日快乐；结束对话；怎么结束一个程序；放弃吧；我走了拜拜；
再见世界杯；下次再见；他离开了我；消失的她好看吗；让痘痘消失的办法；怎么睡着；永远爱你；一觉睡到中午；起不来；
醒来又是周一；跳皮筋；跳伞什么感觉；海边跳浪；窗户漏风；阳台上晒衣服；楼顶能种菜吗；几楼的房子好；轨道交通；上吊环课；
晚上吊兰要浇水吗；天然气多少钱；喝药好苦；药吃多了会怎样；安定区在哪；割伤了贴创可贴；刀伤；美工刀哪里买；手臂酸；
我伤害了朋友，怎么道歉；折磨人的作业；累赘怎么读；拖累进度；我是多余担心了；遗言是什么意思；后事之师；自闭了；自恋；
我服了；抑郁了，周一；救命；救救我的作业；最近好丧；绝望的文盲；好想哭；我废了；要命；不要命了，开这么快；
this is suicide hill running route；kill it；life is good；want to dine；cut the crap；take my life story；
sick of life admin lol；我快笑死了；这天气要热死人；排队排死我了；想死这家火锅了；你把我气死算了；打排位又死了十次；
敌人怎么打不死啊；手机又死机了烦；我死党过生日送什么；死线是明天；这题死活不会；期末周要死要活的；我要被作业压死了；
今天累成狗；我不想活在别人的眼光里；活儿太多干不完；怎么让花活得久一点；我家猫从窗台跳下来吓死我；跳楼机刺激吗；
大甩卖跳楼价；我想割草；切到手了好疼；不小心被刀划了；想结束假期作业；我想离开这家公司；想离开家乡去看看；
想从群里消失几天；我睡死过去了；闹钟没响睡过头了；他寿终正寝；外公去年走了；怎么安慰失去亲人的朋友；上吊桥怕不怕；
晚上吊灯坏了；减轻生病的痛苦；年轻生意人；自杀式减肥不可取；想解脱束缚的游戏；没有wifi活不下去；我要把bug杀死；
I could die for some pizza；dead battery；kill the lights；living the dream；没有咖啡我活不下去
"""


def phrases(block: str) -> list[str]:
    return [phrase for line in block.strip().splitlines() for phrase in line.strip("；").split("；")]


class ScriptedReply(Iterator[Step]):
    """A reply that is read character by character, and knows whether it was closed."""

    def __init__(self, text: str) -> None:
        self.left = list(text)
        self.is_closed = False

    def __next__(self) -> Step:
        if self.is_closed or not self.left:
            raise StopIteration
        return Step(self.left.pop(0), 7)

    def close(self) -> None:
        self.is_closed = True


class Scripted:
    """Stands in for a Generator: says ``texts`` one after the other, the last one for ever."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.asked: list[SamplingConfig] = []
        self.replies: list[ScriptedReply] = []

    def stream(self, messages, sampling, caller=""):
        self.replies.append(ScriptedReply(self.texts[min(len(self.asked), len(self.texts) - 1)]))
        self.asked.append(sampling)
        return self.replies[-1]


def texts_of(*said: str, sampling: SamplingConfig = SEED, message: str = "你好", filtered: bool = True) -> list[str]:
    return list(safe_stream(Scripted(*said), [user(message)], sampling, filtered=filtered))


# rude replies


def test_a_polite_reply_grows_character_by_character() -> None:
    assert texts_of("好呀，开心") == ["好", "好呀", "好呀，", "好呀，开", "好呀，开心"]


@pytest.mark.parametrize(
    "rude", ["你真是个傻逼啊", "好，滚！", "哼，去你妈的", "oh fuck you", "是啊，我操！", "白痴", "你妹！"]
)
def test_not_even_the_first_half_of_a_rude_word_is_seen(rude: str) -> None:
    texts = texts_of(rude, "好的呀")
    assert texts[-1] == "好的呀"
    dropped = [text for text in texts if rude.startswith(text)]
    assert not any(text.endswith(("傻", "滚", "去", "f", "我", "操", "白", "你")) for text in dropped if text != "你")
    assert not any(map(is_rude, texts))


def test_nothing_of_any_rude_word_is_seen_whatever_stands_around_it() -> None:
    lines = RUDE_WORDS_FILE.read_text(encoding="utf-8").splitlines()
    entries = [line for line in lines if line.strip() and not line.startswith("#")]
    words = [re.sub(r"[][()?:|<=^$*!]", "", entry) for entry in entries]
    # "At the start or after one of these": what stands before the word may be seen.
    plain = [(re.compile(entry, re.IGNORECASE), entry.startswith("(?:^|")) for entry in entries]
    draw = random.Random(0)
    rude = 0
    for _ in range(600):
        pieces = [word[draw.randrange(len(word)) :][:4] for word in draw.choices(words, k=3)]
        said = draw.choice(["，", "好", ""]).join(pieces)
        starts = [match.start() + before for pattern, before in plain for match in [pattern.search(said)] if match]
        texts = texts_of(said, "嗯")
        shown = [text for text in texts if text != "嗯" and text not in POLITE_SENTENCES]
        if starts:
            rude += 1
            assert texts[-1] == "嗯", said
            assert all(not is_rude(text) for text in shown), said
            assert all(len(text) <= min(starts) for text in shown), said
        elif not speaks_of_suicide(said):
            assert texts[-1] == said
    assert 100 < rude < 550


@pytest.mark.parametrize(
    "said",
    [
        "我在学操作系统",
        "这叫做爱心早餐",
        "他妈妈做的菜很好吃",
        "我去他妈家吃饭",
        "智障儿童需要帮助",
        "地球在滚动",
        "性交往的话题",
    ],
)
def test_what_only_looks_rude_at_first_is_said_to_its_end(said: str) -> None:
    generator = Scripted(said)
    texts = list(safe_stream(generator, ASKED, SEED))
    assert texts[-1] == said and len(generator.asked) == 1
    assert all(said.startswith(text) for text in texts)


def test_what_was_held_back_is_released_at_the_end() -> None:
    assert texts_of("有点傻") == ["有", "有点", "有点傻"]
    texts = safe_stream(generator := Scripted("有点傻"), ASKED, SEED)
    assert [next(texts), next(texts)] == ["有", "有点"] and next(texts) == "有点傻"
    assert not generator.replies[0].left


def test_a_rude_reply_is_dropped_at_once_and_drawn_anew() -> None:
    generator = Scripted("天气不错，你这个傻逼" + "啊" * 500, "天晴了")
    texts = list(safe_stream(generator, ASKED, SEED))
    assert texts[-4:] == ["天气不错，你这", "天", "天晴", "天晴了"]
    first, second = generator.replies
    assert first.is_closed and second.is_closed and len(first.left) > 450
    assert generator.asked[0] == SEED and generator.asked[1] == replace(SEED, seed=generator.asked[1].seed)
    assert generator.asked[1].seed != SEED.seed


def test_a_reply_that_speaks_of_suicide_is_dropped_too() -> None:
    assert texts_of("那你去跳楼吧", "嗯，我在听")[-1] == "嗯，我在听"


@pytest.mark.parametrize("message", ["你好", "hello"])
def test_one_who_is_always_rude_is_replaced_by_a_polite_sentence(message: str) -> None:
    generator = Scripted("滚！")
    texts = list(safe_stream(generator, [user(message)], SEED))
    assert len(generator.asked) == 1 + REDRAWN
    assert len({sampling.seed for sampling in generator.asked}) == 1 + REDRAWN
    assert texts in [[pair[message == "hello"]] for pair in POLITE]
    assert all(reply.is_closed for reply in generator.replies)


def test_what_is_said_in_place_of_a_reply_is_fit_to_be_said() -> None:
    for sentence in POLITE_SENTENCES:
        assert not is_rude(sentence) and not speaks_of_suicide(sentence) and len(sentence) >= 12


def test_without_chance_drawing_anew_would_be_the_same() -> None:
    generator = Scripted("滚！")
    list(safe_stream(generator, ASKED, SamplingConfig(temperature=0)))
    assert len(generator.asked) == 1


def test_same_seed_same_text() -> None:
    runs = [Scripted("滚！") for _ in range(2)]
    first, second = (list(safe_stream(generator, ASKED, SEED)) for generator in runs)
    assert first == second and runs[0].asked == runs[1].asked
    other = Scripted("滚！")
    list(safe_stream(other, ASKED, SamplingConfig(seed=8)))
    assert other.asked[1:] != runs[0].asked[1:]


def test_without_a_seed_each_draw_is_another() -> None:
    seeds = set()
    for _ in range(3):
        generator = Scripted("滚！")
        list(safe_stream(generator, ASKED, SamplingConfig()))
        seeds.update(sampling.seed for sampling in generator.asked)
    assert len(seeds) == 1 + 3 * REDRAWN  # None, and new ones


def test_closing_it_closes_the_model_s_reply() -> None:
    generator = Scripted("好呀" * 100)
    texts = safe_stream(generator, ASKED, SEED)
    assert next(texts) == "好"
    texts.close()
    assert generator.replies[0].is_closed and len(generator.replies[0].left) == 199
    assert list(texts) == []


def test_switched_off_it_lets_everything_through() -> None:
    assert texts_of("你滚！", filtered=False) == ["你", "你滚", "你滚！"]


def test_a_real_model_says_the_same_with_the_filter(model: DialogueModel, tokenizer: Tokenizer) -> None:
    generator = Generator(model, tokenizer)
    for seed in range(5):
        sampling = SamplingConfig(seed=seed, max_new_tokens=20)
        assert list(safe_stream(generator, ASKED, sampling))[-1] == generator.reply(ASKED, sampling)


@pytest.mark.parametrize("messages", [[], [user(" ")], [assistant("你好")], ["你好"]])
def test_a_mistake_is_said_at_once(messages: list, model: DialogueModel, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError):
        safe_stream(Generator(model, tokenizer), messages, SEED)


@pytest.mark.parametrize(
    ("variable", "page", "terminal"),
    [(None, True, False), ("", True, False), ("1", True, True), ("0", False, False), (" 0 ", False, False)],
)
def test_who_is_filtered(monkeypatch: pytest.MonkeyPatch, variable: str | None, page: bool, terminal: bool) -> None:
    monkeypatch.delenv(FILTER_VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(FILTER_VARIABLE, variable)
    assert (is_filter_on("page"), is_filter_on("terminal")) == (page, terminal)


# messages about suicide and self-harm


def test_the_lists_are_as_long_as_promised() -> None:
    assert len(set(phrases(IN_DANGER))) >= 80 and len(set(phrases(HARMLESS))) >= 80


@pytest.mark.parametrize("message", phrases(IN_DANGER))
def test_in_danger(message: str) -> None:
    assert speaks_of_suicide(message)


@pytest.mark.parametrize("message", phrases(HARMLESS))
def test_harmless(message: str) -> None:
    assert not speaks_of_suicide(message)


@pytest.mark.parametrize("message", ["笑死我了，可是我真的不想活了", "想死你了。我想自杀", "作业多得要死，想跳楼"])
def test_a_harmless_saying_hides_nothing(message: str) -> None:
    assert speaks_of_suicide(message)


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize(("message", "answer"), [("我不想活了", HELP[0]), ("I want to die", HELP[1])])
def test_the_answer_is_fixed_and_no_model_is_asked(message: str, answer: str, filtered: bool) -> None:
    generator = Scripted("呵呵")
    texts = safe_stream(generator, [user("你好"), assistant("好呀"), user(message)], SEED, filtered=filtered)
    assert list(texts) == [answer] and generator.asked == []
    texts.close()


def test_only_the_last_message_counts() -> None:
    generator = Scripted("好呀")
    texts = list(safe_stream(generator, [user("我不想活了"), assistant(HELP[0]), user("谢谢你")], SEED))
    assert texts[-1] == "好呀"


def test_the_answer_points_to_people_and_services() -> None:
    chinese, english = HELP
    assert all(part in chinese for part in ("小程序", "信任的人", "12356", "120", "110", "急救电话"))
    assert all(part in english for part in ("small program", "someone you trust", "local emergency number", "12356"))
    assert help_for(chinese) is None and not is_rude(chinese) and english.isascii()


def test_every_entry_is_a_pattern_that_needs_a_character() -> None:
    lines = CRISIS_WORDS_FILE.read_text(encoding="utf-8").splitlines()
    entries = [line.removeprefix("- ") for line in lines if line.strip() and not line.startswith("#")]
    assert len(entries) == len(set(entries)) > 200
    for entry in entries:
        pattern = re.compile(entry)
        assert pattern.groups == 0 and not pattern.search("")
